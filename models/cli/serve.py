"""``cen serve RUN``."""

from __future__ import annotations

import argparse

from models.cli.arguments import Commands, add_checkpoint, add_command, add_overrides


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "serve", help="answer a browser, and programs in JSON, with a trained segmentation network"
    )
    add_checkpoint(parser)
    add_overrides(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; default: this machine's own"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="0: a free one, which is printed; default: 8000"
    )
    parser.add_argument(
        "--queue", type=int, default=32, help="requests that may wait while one is worked on; default: 32"
    )
    parser.add_argument(
        "--max-upload-mb", type=float, default=32, help="size of a request with its files; default: 32"
    )
    parser.add_argument(
        "--max-megapixels", type=float, default=4, help="size of an image, in millions; default: 4"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from models.serve.server import serve

    serve(
        arguments.checkpoint,
        arguments.overrides,
        arguments.host,
        arguments.port,
        queue=arguments.queue,
        upload_mb=arguments.max_upload_mb,
        megapixels=arguments.max_megapixels,
    )

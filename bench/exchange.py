"""Run ``bench.experiments.exchange`` under the command's earlier name, ``python -m bench.exchange``."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("bench.experiments.exchange", run_name="__main__", alter_sys=True)

# The commands on CPUs: docker build --file docker/cpu.Dockerfile --tag cen .
#                       docker run --rm cen recipes
#
# The commands of its RUN lines have been run by hand on the same release of Debian; the image itself has not been
# built by the authors.
FROM python:3.11.14-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# Plain torch may be a build for GPUs of several GB. PIP_EXTRA_INDEX_URL names an index with builds for CPUs.
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/cen \
    && /opt/cen/bin/pip install --no-cache-dir "setuptools>=77" ninja numpy "$TORCH"
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY cen_ext cen_ext
COPY models models
RUN FORCE_CUDA=0 /opt/cen/bin/pip install --no-cache-dir --no-build-isolation ".[models,serve]"

FROM python:3.11.14-slim-bookworm
COPY --from=build /opt/cen /opt/cen
RUN useradd --create-home cen
USER cen
WORKDIR /home/cen
ENV PATH=/opt/cen/bin:$PATH
RUN cen --version
ENTRYPOINT ["cen"]
CMD ["--help"]

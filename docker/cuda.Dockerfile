# The commands on GPUs: docker build --file docker/cuda.Dockerfile --tag cen:cuda .
#                       docker run --rm --gpus all cen:cuda --version
#
# The image has not been built by the authors, nor have its RUN lines been run; the CUDA kernels compile with nvcc 13.0.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# A build of torch for CUDA 13, as nvcc is; it brings the libraries of CUDA that it needs.
ARG TORCH=torch==2.13.0
RUN python3 -m venv /opt/cen \
    && /opt/cen/bin/pip install --no-cache-dir "setuptools>=77" ninja numpy "$TORCH"
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY cen_ext cen_ext
COPY models models
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"
RUN FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST" \
    /opt/cen/bin/pip install --no-cache-dir --no-build-isolation ".[models,serve]"

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/cen /opt/cen
RUN useradd --create-home cen
USER cen
WORKDIR /home/cen
ENV PATH=/opt/cen/bin:$PATH
RUN cen --version
ENTRYPOINT ["cen"]
CMD ["--help"]

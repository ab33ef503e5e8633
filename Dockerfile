# docker build .                              for CPUs
# docker build --build-arg VARIANT=cuda .     for GPUs, with the GPU kernels' packages
# The package index's torch is its CUDA build, several GB; where an index of CPU builds is at hand,
# name it with --build-arg TORCH_INDEX=URL.
ARG VARIANT=cpu

FROM python:3.11-slim AS base-cpu

FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 AS base-cuda
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev git \
 && rm -rf /var/lib/apt/lists/*

FROM base-${VARIANT}
ARG VARIANT
ARG TORCH_INDEX=
WORKDIR /workspace
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY pyproject.toml constraints.txt README.md ./
COPY data_prep data_prep
COPY pretrain pretrain
COPY evals evals
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --editable ".[datasets,tokenizers,deepspeed]" \
 && if [ "${VARIANT}" = cuda ]; then \
      pip install --no-cache-dir triton flash-linear-attention \
      && pip install --no-cache-dir --no-build-isolation flash-attn; \
    fi
CMD ["python", "-m", "pretrain", "--help"]

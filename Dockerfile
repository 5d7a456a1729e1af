# Both stages start from one tag, so that the venv's interpreter is where it was built. A release pins the digest:
# docker build --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements-build.lock requirements-image.lock ./
RUN pip install --require-hashes -r requirements-build.lock \
    && python -m venv --without-pip /opt/oncegate \
    && pip --python /opt/oncegate/bin/python install --require-hashes --only-binary=:all: -r requirements-image.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY proxy proxy
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/oncegate/bin/python install --no-deps --no-index /wheels/oncegate-*.whl

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/oncegate /opt/oncegate
# Bodies over 1 MiB are spooled: /tmp is the one place that must be writable (a tmpfs will do).
# There is no embedded store in here: ONCEGATE_STORE_URL must be named.
ENV PATH=/opt/oncegate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ONCEGATE_LISTEN=0.0.0.0:8080 \
    ONCEGATE_ADMIN_LISTEN=0.0.0.0:8081 \
    ONCEGATE_SPOOL_DIR=/tmp
# A number, so that Kubernetes' runAsNonRoot can see that it is not root.
USER 65532:65532
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# Liveness, not readiness: an outage of the store must not restart healthy proxies.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["oncegate", "healthcheck"]
ENTRYPOINT ["oncegate"]
CMD ["serve"]

# Two images:
#   app     for producers, migrations, the poller, Flower and the worker of the paid routes; it has no torch and no model
#   worker  for the embedding worker; it has torch with CUDA and the bundled model
#
#   docker build --target app    -t chunkmill-app .
#   docker build --target worker -t chunkmill-worker .
#
# deploy/check-images.sh runs the COPY and RUN lines below in a virtual environment, without Docker.

FROM python:3.12-slim-trixie AS base
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1


# This stage is a package with our metadata and no code. The dependencies are installed from it, so that their layer
# (gigabytes for the worker) stays the same, in the cache and on every machine that pulls it, when only our code changed.
FROM base AS stub
WORKDIR /src
RUN mkdir -p app/chunkmill workers/chunkmill_workers alembic && \
    touch README.md app/chunkmill/__init__.py workers/chunkmill_workers/__init__.py
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt ./

FROM stub AS app-deps
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ".[flower,metrics,openai,tracing]"

FROM stub AS worker-deps
# An additional package index, such as PyTorch's index of CPU-only wheels, which makes the image about 4 GB smaller.
# Empty means none. Of equal versions pip prefers the one with a local part, so it takes `2.13.0+cpu`.
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ".[worker,tracing]"


FROM base AS wheel
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY app app
COPY workers workers
COPY alembic alembic
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /dist .


# Both images share this stage. It has no HEALTHCHECK, because one image runs several commands and each has its own
# health check (in docker-compose.yml).
FROM base AS runtime
# The home folder holds the models that a worker downloads. It is the only folder that needs a volume. A named
# volume that is mounted on it takes over the owner that is set here.
RUN groupadd --gid 10001 chunkmill && \
    useradd --uid 10001 --gid 10001 --create-home --home-dir /var/lib/chunkmill --shell /usr/sbin/nologin chunkmill
ENV HOME=/var/lib/chunkmill \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /var/lib/chunkmill
# Never use SIGQUIT: on Celery's threads pool it ends in a traceback instead of a drain.
STOPSIGNAL SIGTERM


FROM runtime AS app
COPY --from=app-deps /opt/venv /opt/venv
# --force-reinstall is needed because the stub has the same version.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --force-reinstall /dist/*.whl
USER 10001:10001
CMD ["chunkmill", "--help"]


FROM runtime AS worker
COPY --from=worker-deps /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --force-reinstall /dist/*.whl
USER 10001:10001
CMD ["celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu", "--loglevel=INFO"]

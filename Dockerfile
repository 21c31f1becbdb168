# syntax=docker/dockerfile:1
#
# Two images:
#   app     producer, migrations, poller, Flower, worker of the paid routes: no torch, no model
#   worker  the embedding worker: torch with CUDA and the bundled model
#
#   docker build --target app    -t chunkmill-app .
#   docker build --target worker -t chunkmill-worker .
#
# deploy/check-images.sh runs the COPY and RUN lines below in a virtual environment, without Docker.

FROM python:3.12-slim-trixie AS base
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1


# A package with our metadata and no code. The dependencies are installed from it, so that their layer (for the
# worker: gigabytes) stays the same in the cache and on every machine that pulls it when only our code changed.
FROM base AS stub
WORKDIR /src
RUN mkdir app workers alembic && touch README.md app/__init__.py workers/__init__.py
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt ./

FROM stub AS app-deps
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ".[flower,metrics,openai,tracing]"

FROM stub AS worker-deps
# A further package index, such as PyTorch's index of CPU-only wheels: the image then is some 4 GB smaller.
# Empty means none. Of equal versions pip takes the one with the local part, so `2.13.0+cpu` wins.
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ".[worker,tracing]"


FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY workers workers
COPY alembic alembic
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /dist .


# What both images share. There is no HEALTHCHECK: one image runs several commands, and only whoever starts one
# knows what healthy means for it (docker-compose.yml says it for each).
FROM base AS runtime
# The home holds what a worker fetches (models that are not bundled): the one place worth a volume. A named
# volume mounted on it takes over the owner set here.
RUN groupadd --gid 10001 chunkmill && \
    useradd --uid 10001 --gid 10001 --create-home --home-dir /var/lib/chunkmill --shell /usr/sbin/nologin chunkmill
ENV HOME=/var/lib/chunkmill \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /var/lib/chunkmill
# Never SIGQUIT: on Celery's threads pool it ends in a traceback instead of a drain.
STOPSIGNAL SIGTERM


FROM runtime AS app
COPY --from=app-deps /opt/venv /opt/venv
# --force-reinstall: the stub has the same version.
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --force-reinstall /dist/*.whl
USER 10001:10001
CMD ["chunkmill", "--help"]


FROM runtime AS worker
COPY --from=worker-deps /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --force-reinstall /dist/*.whl
USER 10001:10001
CMD ["celery", "-A", "workers", "worker", "-Q", "gpu", "--loglevel=INFO"]

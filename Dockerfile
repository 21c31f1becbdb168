# Two images:
#   app     for producers, migrations, backups, the poller, Flower and the worker of the paid routes; it has no torch and
#           no model. The programs of Postgres that a backup needs come with the extra `embedded`; what cuts documents
#           into chunks, with `documents`
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


# The dependencies are installed without our code, so that their layer (gigabytes for the worker) stays the same, in the
# cache and on every machine that pulls it, when only our code changed. Each file is known by its digest, and nothing is
# resolved or built.
FROM base AS stub
WORKDIR /src
RUN mkdir -p app/chunkmill/system && python -m venv /opt/venv
COPY requirements.lock ./
COPY app/chunkmill/system/locked.py app/chunkmill/system/

FROM stub AS app-deps
RUN --mount=type=cache,target=/root/.cache/pip \
    python app/chunkmill/system/locked.py documents,embedded,flower,gateway,metrics,openai,tracing > requirements.txt && \
    pip install --require-hashes --no-deps --only-binary :all: -r requirements.txt

FROM stub AS worker-deps
# An additional package index, such as PyTorch's index of CPU-only wheels, which makes the image about 4 GB smaller, and
# the digest of the wheel that it gives, which its page shows behind the file's name. Empty means none.
ARG PIP_EXTRA_INDEX_URL=
ARG TORCH_SHA256=
RUN --mount=type=cache,target=/root/.cache/pip \
    python app/chunkmill/system/locked.py worker,tracing > requirements.txt && \
    python app/chunkmill/system/locked.py --torch "$([ -z "${TORCH_SHA256:-}" ] && echo cuda || echo cpu)" worker > torch.txt && \
    pip install --require-hashes --no-deps --only-binary :all: -r requirements.txt && \
    pip install --require-hashes --no-deps --only-binary :all: -r torch.txt


FROM base AS wheel
WORKDIR /src
COPY pyproject.toml constraints.txt requirements.lock README.md LICENSE ./
COPY app app
COPY workers workers
COPY alembic alembic
RUN --mount=type=cache,target=/root/.cache/pip \
    python app/chunkmill/system/locked.py build > build.txt && \
    pip install --require-hashes --no-deps --only-binary :all: -r build.txt && \
    pip wheel --no-deps --no-build-isolation --wheel-dir /dist .


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

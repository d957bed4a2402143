# Upkeep's image: both programs from one wheel, with exactly the dependencies of requirements.txt.
#
# BASE is any Debian-like image with Python 3.11 or newer, its venv module and CA certificates; it
# is an argument so that a site can use its own mirror or hardened base. The exporter and the
# remediator's webhook run as the unprivileged user below; what needs root (reading other users'
# /proc, signals, kubeadm) asks for it in its manifest, not here.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY requirements.txt requirements-build.txt ./
RUN python3 -m venv /opt/upkeep \
    && /opt/upkeep/bin/python -m pip install --no-cache-dir --require-hashes -r requirements.txt \
    && python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --no-cache-dir --require-hashes -r requirements-build.txt
COPY pyproject.toml README.md ./
COPY exporter exporter
COPY remediator remediator
RUN /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && /opt/upkeep/bin/python -m pip install --no-cache-dir --no-deps /dist/upkeep-*.whl \
    && /opt/upkeep/bin/python -m pip uninstall -q -y pip setuptools

FROM ${BASE}
# tini is PID 1: it reaps what a fix's subprocess (kubeadm) may leave. An exporter of zombies that
# collects zombies of its own would be a poor advertisement.
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/dpkg.log /var/log/apt \
    && groupadd --system --gid 65532 upkeep \
    && useradd --system --uid 65532 --gid upkeep --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin upkeep
COPY --from=build /opt/upkeep /opt/upkeep
ENV PATH=/opt/upkeep/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
EXPOSE 9790 9791
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["upkeep-exporter"]

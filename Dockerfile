# syntax=docker/dockerfile:1
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
WORKDIR /src
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY bids_harmony ./bids_harmony
RUN python -m venv /opt/bids_harmony \
 && /opt/bids_harmony/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM ${BASE} AS app
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="bids_harmony" \
      org.opencontainers.image.description="Harmonization of multi-site brain MRI" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/bids_harmony /opt/bids_harmony
# No HOME is set: any user, a read-only root and Apptainer's --containall must work.
ENV PATH=/opt/bids_harmony/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache \
    BIDS_HARMONY_IMAGE=bids_harmony:${VERSION}
RUN bids_harmony --version \
 && python -c "import ants, nipype, bids_harmony.workflows.participant"
WORKDIR /tmp
ENTRYPOINT ["/opt/bids_harmony/bin/bids_harmony"]

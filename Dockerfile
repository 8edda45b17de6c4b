# syntax=docker/dockerfile:1
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Index of the torch build. The default runs neural methods on the CPU. For NVIDIA GPUs name one of
# PyTorch's CUDA indices, e.g. https://download.pytorch.org/whl/cu126 : the image grows by several
# GB, and the host needs the NVIDIA driver and container toolkit. Only the CPU build is checked here.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY bids_harmony ./bids_harmony
RUN python -m venv /opt/bids_harmony \
 && /opt/bids_harmony/bin/pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" \
      "torch==$(sed -n 's/^torch==//p' constraints.txt)" \
 && /opt/bids_harmony/bin/pip install --no-cache-dir --constraint constraints.txt ".[neural]" \
 && chmod -R a+rX /opt/bids_harmony

FROM ${BASE} AS app
ARG BASE
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="bids_harmony" \
      org.opencontainers.image.description="Harmonization of multi-site brain MRI" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
COPY --from=build /opt/bids_harmony /opt/bids_harmony
# No HOME is set: any user, a read-only root and Apptainer's --containall must work.
ENV PATH=/opt/bids_harmony/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache \
    BIDS_HARMONY_IMAGE=bids_harmony:${VERSION}
# The build fails if a library is missing. What root leaves in /tmp no other user could write to.
RUN test "$(bids_harmony --version)" = "bids_harmony ${VERSION}" \
 && python -c "import ants, torch, nflows, lightning, bids_harmony.cli.levels" \
 && rm -rf /tmp/* /root/.nipype
WORKDIR /tmp
ENTRYPOINT ["/opt/bids_harmony/bin/bids_harmony"]

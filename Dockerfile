# The stages and everything they need.
#
#   docker build --tag post-training .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" --volume /scratch:/scratch \
#     --env HF_MODEL_CKPT=/scratch/Qwen3-8B --env MLM_WORK_DIR=/scratch/work \
#     post-training quantize.sh Qwen/Qwen3-8B FP8_DEFAULT_CFG
#
# Without a GPU, a small image from Debian's Python and torch's CPU build:
#
#   docker build --tag post-training-cpu --build-arg BASE_IMAGE=debian:trixie-slim .
#
# The base's own Python (3.12 or 3.13), torch and Transformer Engine are used as they are: what is
# added lies in an environment on top of them. A base without torch gets it from TORCH_INDEX.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="post-training" \
      org.opencontainers.image.description="Convert, quantize, prune, score and export language models"

# Package index of torch for a base without it; empty: pip's own, whose torch brings CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG USER_ID=1000

USER root
ENV VIRTUAL_ENV=/opt/venv
ENV PATH=${VIRTUAL_ENV}/bin:${PATH} \
    MLM_SKIP_INSTALL=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /workspace/nmm-sandbox
# First what changes rarely, so that a change of the sources does not install everything again.
COPY requirements.txt docker/install.sh docker/
RUN --mount=type=cache,target=/root/.cache/pip TORCH_INDEX=${TORCH_INDEX} bash docker/install.sh
COPY . .
RUN useradd --non-unique --uid ${USER_ID} --create-home runner && mkdir -p /workspace/scratch && \
    chmod 1777 /workspace/scratch
USER runner
ENTRYPOINT ["bash", "/workspace/nmm-sandbox/docker/entrypoint.sh"]

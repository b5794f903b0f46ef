# shellcheck shell=bash
# A job step inside a container: pyxis, Apptainer or Singularity. Sourced by job.sh; only defines
# functions. Variables are explained in slurm/README.md.

# enter_container FOLDER: extend STEP to run in the image, with the repository mounted at FOLDER.
enter_container() {
  local folder=$1 runtime=${CONTAINER_RUNTIME:-pyxis} variable
  [[ -n "${USER_FSW:-}" ]] || fail "USER_FSW (not set)" \
    "a container sees the scratch folder that it names, and nothing else" "USER_FSW=/scratch/..."
  for variable in SCRIPT_DIR USER_FSW; do
    # Both runtimes separate mounts by comma and colon.
    [[ "${!variable}" != *[,:]* && "${!variable}" == /* ]] || fail "$variable=${!variable}" \
      "a folder that a container mounts is named from / on, without comma or colon" "rename it"
  done
  # Megatron-LM's paths in the container, and the paths of the host.
  local mounts="$SCRIPT_DIR:$folder,$USER_FSW:/workspace/scratch"
  mounts+=",$SCRIPT_DIR:$SCRIPT_DIR,$USER_FSW:$USER_FSW${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
  for variable in MLM_WORK_DIR MLM_MODEL_SAVE EXPORT_DIR; do
    is_mounted "${!variable:-}" "$mounts" || fail "$variable=${!variable}" \
      "the container does not see this folder, and what it writes there is lost" \
      "CONTAINER_MOUNTS=FOLDER:FOLDER, or a folder in USER_FSW"
  done
  [[ -n "${CONTAINER_RUNTIME:-}" || "$CONTAINER_IMAGE" != *.sif ]] || runtime=apptainer
  case "$runtime" in
    pyxis)
      [[ "$mounts" != *[[:space:]]* ]] || fail "container mounts $mounts" \
        "pyxis ends a folder's name at white space" "rename the folder"
      STEP+=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$mounts"
        "--container-workdir=$folder" --no-container-entrypoint)
      ;;
    apptainer | singularity)
      # Apptainer's name until 2021, and a fork's today; the options are the same.
      [[ "$runtime" == singularity ]] || type -P apptainer >/dev/null ||
        ! type -P singularity >/dev/null || runtime=singularity
      [[ -z "${SLURM_JOB_ID:-}" ]] || type -P "$runtime" >/dev/null || fail "$runtime" \
        "it is not on the PATH of $(hostname)" \
        "CONTAINER_RUNTIME=pyxis, or a set-up file (SANDBOX_ENV_SETUP) that loads its module"
      STEP+=("$runtime" exec --nv --bind "$mounts" --pwd "$folder" "$CONTAINER_IMAGE")
      ;;
    *) fail "CONTAINER_RUNTIME=$runtime" "unknown" "pyxis, apptainer or singularity" ;;
  esac
  # The host's interpreter and packages do not exist inside.
  for variable in VIRTUAL_ENV CONDA_PREFIX MLM_VENV PYTHONHOME PYTHONPATH; do unset "$variable"; done
  export PYTHON=${CONTAINER_PYTHON:-python3} PYTHONNOUSERSITE=1
}

# is_mounted PATH MOUNTS: whether the container sees PATH; true for a relative path.
is_mounted() {
  local entry inside entries
  [[ "$1" == /* ]] || return 0
  IFS=, read -ra entries <<<"$2"
  for entry in "${entries[@]}"; do
    IFS=: read -r _ inside _ <<<"$entry:${entry%%:*}"
    [[ "$1/" != "${inside%/}/"* ]] || return 0
  done
  return 1
}

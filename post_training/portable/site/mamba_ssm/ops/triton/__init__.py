"""See ``mamba_ssm``."""

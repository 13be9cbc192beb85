"""The authors' own backbones, run unmodified on a CPU, against ours."""

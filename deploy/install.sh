#!/bin/sh
# Fills /opt/maskdm with what MaskDM needs, for deploy/Dockerfile: ACCELERATOR cpu or cuda, EXTRAS, TORCH_INDEX.
# /wheels holds wheels to take first; for a CPU the build of torch is looked for there, then in TORCH_INDEX.
set -eu
python -m venv --without-pip /opt/maskdm
pip() { python -m pip --python /opt/maskdm/bin/python --disable-pip-version-check "$@"; }
loud() { printf '%s\n' '****************************************************************' "$@" \
  '****************************************************************'; }

# torch_from WHERE…: a build of torch, with its torchvision if there is one; the tested versions if they are there.
torch_from() {
  for wanted in '--constraint constraints.txt -r torch.txt' '-r torch.txt' '-r torch-alone.txt'; do
    pip install --no-deps "$@" $wanted && return
  done
  return 1
}

python - >requirements.txt <<'END'
import os, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = os.environ.get("EXTRAS", "").split()
print("\n".join(sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])))
END
grep -E '^(torch|torchvision)[^a-z]' requirements.txt >torch.txt
grep -E '^torch[^a-z]' requirements.txt >torch-alone.txt
grep -v '^#' constraints.txt >exact.txt

case $ACCELERATOR in
  cuda) ;;
  cpu)
    if torch_from --no-index --find-links /wheels 2>/dev/null ||
      { [ -n "$TORCH_INDEX" ] && torch_from --index-url "$TORCH_INDEX"; }; then
      # The versions in constraints.txt are those of the build with CUDA; what was found takes their place.
      grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' constraints.txt | grep -v '^#' >exact.txt
      pip freeze | sed -E 's/^([a-z]+) @ .*\/[a-z]+-([^-]+)-.*/\1==\2/; s/%2B/+/' >>exact.txt
    else
      loud "No build of torch for CPUs: the usual one is taken, which may bring CUDA (several GB)." \
        "Give a folder of wheels or TORCH_INDEX, see docs/containers.md."
    fi
    ;;
  *) echo "ACCELERATOR is '$ACCELERATOR': give cpu or cuda" >&2; exit 2 ;;
esac

pip install --find-links /wheels --constraint exact.txt -r requirements.txt
if [ "$ACCELERATOR" = cpu ] && ! /opt/maskdm/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)'; then
  loud "This image holds CUDA, though ACCELERATOR is cpu: it works, and is several GB larger than it need be."
fi
if ! /opt/maskdm/bin/python -c 'import torchvision' 2>/dev/null; then
  loud "The torchvision found does not fit this torch: it and timm are left out." \
    "Without them: --layout torchvision:NAME, and feature networks for quality figures."
  pip uninstall --quiet --yes torchvision timm
fi

# What nothing reads at run time: C++ headers, static libraries, packages' own tests; and uv, which installs.
packages=$(/opt/maskdm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$packages"/torch/include "$packages"/torch/share "$packages"/torch/test "$packages"/torch/lib/*.a
find "$packages" -type d -name tests -path '*/tests' -prune -exec rm -rf {} +
pip uninstall --quiet --yes uv
/opt/maskdm/bin/python -c 'import torch, flwr; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
du -sh /opt/maskdm

"""SGLang imports torchvision, whose native library may be missing beside a CPU build of torch."""

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

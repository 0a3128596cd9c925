"""Before any test module imports transformers."""

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

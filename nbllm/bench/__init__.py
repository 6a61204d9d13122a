"""`nbllm bench`: fixed workloads on any model and device, checked while they are measured."""

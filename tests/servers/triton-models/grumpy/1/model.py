"""Answers every call with a model error: healthy and ready, and of no use."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [triton.InferenceResponse(error=triton.TritonError("grumpy says no")) for _ in requests]

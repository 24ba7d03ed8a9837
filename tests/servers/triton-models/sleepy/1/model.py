"""Sleeps `ms` milliseconds and answers `ms`. A cancelled call ends early and leaves the line "sleepy: cancelled" in the log."""

import time

import numpy
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        ms = int(triton.get_input_tensor_by_name(request, "ms").as_numpy()[0])
        end = time.monotonic() + ms / 1000
        while (left := end - time.monotonic()) > 0:
            if request.is_cancelled():
                triton.Logger.log_info("sleepy: cancelled")
                return triton.InferenceResponse(error=triton.TritonError("cancelled", triton.TritonError.CANCELLED))
            time.sleep(min(left, 0.01))
        return triton.InferenceResponse([triton.Tensor("ms", numpy.array([ms], numpy.int32))])

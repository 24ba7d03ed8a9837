"""Streams `n` responses "token-0", "token-1", ..., each after `ms` milliseconds (0 when not sent).

A negative `n` streams -n of them and then a model error. Ends early, with a line in the log, when the client cancels.
"""

import threading
import time

import numpy
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        # A thread each, so that two streams interleave on the one instance.
        for request in requests:
            n, ms = self.number(request, "n"), self.number(request, "ms")
            threading.Thread(target=self.stream, args=(request.get_response_sender(), n, ms), daemon=True).start()

    def number(self, request, name):
        tensor = triton.get_input_tensor_by_name(request, name)
        return int(tensor.as_numpy()[0]) if tensor else 0

    def stream(self, sender, n, ms):
        for i in range(abs(n)):
            time.sleep(ms / 1000)
            if sender.is_cancelled():
                triton.Logger.log_info("tokens: cancelled")
                break
            sender.send(triton.InferenceResponse([triton.Tensor("token", numpy.array([b"token-%d" % i], object))]))
        else:
            if n < 0:
                sender.send(triton.InferenceResponse(error=triton.TritonError("tokens ran out")))
        sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

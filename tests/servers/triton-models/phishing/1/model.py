"""Runs the model.onnx that triton.sh puts beside it: this Triton build has no ONNX backend of its own."""

import os

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        features = triton.get_input_tensor_by_name(request, "features").as_numpy()
        (score,) = self.session.run(["score"], {"features": features})
        return triton.InferenceResponse([triton.Tensor("score", score)])

"""Every expected case through an unmodified tritonclient (gRPC), unary and streamed. Arguments as those of triton_http.py."""

import json
import queue
import sys

import numpy
import tritonclient.grpc as triton

address, trust_bundle, certificate, key, expected = sys.argv[1:]
expected = json.load(open(expected))
cases, tolerance = expected["cases"], expected["tolerance"]

client = triton.InferenceServerClient(
    address, ssl=True, root_certificates=trust_bundle, private_key=key, certificate_chain=certificate
)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("phishing")
metadata = client.get_model_metadata("phishing")
assert metadata.name == "phishing" and list(metadata.versions) == ["1"], metadata
assert client.get_server_metadata().name, "the server has a name"


def check(result, rows):
    scores = result.as_numpy("score")
    assert scores.shape == (len(rows), 1) and scores.dtype == numpy.float32, scores
    for score, case in zip(scores[:, 0], rows):
        assert abs(score - case["score"]) <= tolerance, (case, score)


def tensor(name, values, datatype):
    tensor = triton.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def features(rows):
    return [tensor("features", numpy.array([case["features"] for case in rows], numpy.float32), "FP32")]


def entities(rows):
    return [tensor("site_id", numpy.array([case["entity"].encode() for case in rows], object), "BYTES")]


check(client.infer("phishing", features(cases)), cases)
check(client.infer("phishing", entities(cases)), cases)
for case in cases:
    check(client.infer("phishing", [], parameters={"entity_id": case["entity"]}), [case])
result = client.infer("phishing", entities(cases[:2]), request_id="r-7", model_version="1", client_timeout=5)
assert result.get_response().id == "r-7" and result.get_response().model_version == "1", result.get_response()

answers = queue.Queue()
client.start_stream(callback=lambda result, error: answers.put((result, error)))
for index, case in enumerate(cases):
    inputs = features([case]) if index % 2 else entities([case])
    client.async_stream_infer("phishing", inputs, request_id=f"s-{index}")
found = {}
for _ in cases:
    result, error = answers.get(timeout=20)
    assert error is None, error
    found[result.get_response().id] = result
for index, case in enumerate(cases):
    check(found[f"s-{index}"], [case])
# A bad request in a stream fails alone.
bad = triton.InferInput("features", [1, 3], "FP32")
bad.set_data_from_numpy(numpy.zeros((1, 3), numpy.float32))
client.async_stream_infer("phishing", [bad], request_id="bad")
result, error = answers.get(timeout=20)
assert error is not None, "three columns are not nine"
client.async_stream_infer("phishing", features(cases[:1]), request_id="after")
result, error = answers.get(timeout=20)
assert error is None, error
check(result, cases[:1])
client.stop_stream()
print("ok")

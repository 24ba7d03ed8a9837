"""Every expected case through an unmodified tritonclient (HTTP). Arguments: HOST:PORT TRUST_BUNDLE CERTIFICATE KEY EXPECTED."""

import json
import ssl
import sys

import numpy
import tritonclient.http as triton

address, trust_bundle, certificate, key, expected = sys.argv[1:]
expected = json.load(open(expected))
cases, tolerance = expected["cases"], expected["tolerance"]


def tls():
    context = ssl.create_default_context(cafile=trust_bundle)
    context.load_cert_chain(certificate, key)
    return context


client = triton.InferenceServerClient(address, ssl=True, ssl_context_factory=tls)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("phishing")
metadata = client.get_model_metadata("phishing")
assert metadata["name"] == "phishing" and metadata["versions"] == ["1"], metadata
assert client.get_server_metadata()["name"], "the server has a name"


def check(result, rows):
    scores = result.as_numpy("score")
    assert scores.shape == (len(rows), 1) and scores.dtype == numpy.float32, scores
    for score, case in zip(scores[:, 0], rows):
        assert abs(score - case["score"]) <= tolerance, (case, score)


def tensor(name, values, datatype, binary):
    tensor = triton.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


for binary in (True, False):
    outputs = [triton.InferRequestedOutput("score", binary_data=binary)]
    features = numpy.array([case["features"] for case in cases], numpy.float32)
    check(client.infer("phishing", [tensor("features", features, "FP32", binary)], outputs=outputs), cases)
    entities = numpy.array([case["entity"].encode() for case in cases], object)
    check(client.infer("phishing", [tensor("site_id", entities, "BYTES", binary)], outputs=outputs), cases)
for case in cases:
    check(client.infer("phishing", [], parameters={"entity_id": case["entity"]}), [case])
result = client.infer("phishing", [], request_id="r-7", model_version="1", parameters={"entity_id": cases[0]["entity"]})
assert result.get_response()["id"] == "r-7", result.get_response()
assert result.get_response()["model_version"] == "1", result.get_response()
print("ok")

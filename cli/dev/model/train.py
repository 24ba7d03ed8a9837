"""Trains the phishing classifier that `spillway dev` and the scenario tests serve.

Writes, beside itself: 1/model.onnx, expected.json, site.csv, page.csv.

Packages (CPython 3.11, in a venv that lives outside the repository):
    river==0.26.1 scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1 onnx==1.23.2 onnxruntime==1.31.1

Two runs on one machine write the same bytes; another CPU or BLAS may move the
last digits of the weights, so the four files are committed together.
"""

import csv
import datetime
import json
import os
import pathlib

# One BLAS thread: a parallel sum changes its order, hence its last bits.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import onnx
import onnxruntime
import sklearn
from onnx import TensorProto, helper, numpy_helper
from river import datasets
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

SITE = ["age_of_domain", "is_popular", "long_url", "ip_in_url", "https"]
PAGE = ["empty_server_form_handler", "popup_window", "request_from_other_domain", "anchor_from_other_domain"]
FEATURES = SITE + PAGE  # the column order of the model's input
SEED = 20260101
EXPECTED_ROWS = 64
TOLERANCE = 1e-5  # absolute, on the score: sklearn sums in f64, the graph in f32
FIRST_EVENT = datetime.datetime(2026, 1, 1)
HERE = pathlib.Path(__file__).resolve().parent


def main():
    rows, phishing = load()
    train, held_out = train_test_split(np.arange(len(rows)), test_size=0.2, random_state=SEED, stratify=phishing)
    scaler = StandardScaler().fit(rows[train])
    # Small and regularised: nine features of two or three values each leave little to learn by heart.
    network = MLPClassifier((16, 8), solver="lbfgs", alpha=1.0, max_iter=2000, random_state=SEED)
    network.fit(scaler.transform(rows[train]), phishing[train])
    scores = network.predict_proba(scaler.transform(rows))[:, 1]

    model = graph(scaler, network)
    (HERE / "1").mkdir(exist_ok=True)
    (HERE / "1" / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    served = session.run(["score"], {"features": rows.astype(np.float32)})[0][:, 0]
    difference = float(np.abs(served - scores).max())
    assert difference < TOLERANCE / 4, f"the graph differs from sklearn by {difference}"

    write_group("site", SITE, rows)
    write_group("page", PAGE, rows)
    seen = {tuple(row) for row in rows[train]}
    unseen = [i for i in held_out if tuple(rows[i]) not in seen]
    hit = (scores > 0.5) == phishing
    summary = {
        "trained_with": {"scikit-learn": sklearn.__version__, "onnx": onnx.__version__, "seed": SEED},
        "features": FEATURES,
        "rows": {"all": len(rows), "train": len(train), "held_out": len(held_out), "held_out_unseen": len(unseen)},
        # Many sites share one feature row; `unseen` counts only rows whose like was not trained on.
        "accuracy": {
            "train": round(float(hit[train].mean()), 4),
            "held_out": round(float(hit[held_out].mean()), 4),
            "held_out_unseen": round(float(hit[unseen].mean()), 4),
            "always_the_majority": round(float(max(phishing.mean(), 1 - phishing.mean())), 4),
        },
        "tolerance": TOLERANCE,
        "onnxruntime_max_difference": float(f"{difference:.2g}"),
    }
    cases = [
        {"entity": entity(i), "features": rows[i].tolist(), "score": round(float(scores[i]), 9)}
        for i in range(EXPECTED_ROWS)
    ]
    # One case a line, so that a diff after a retraining can be read.
    text = json.dumps(summary, indent=1)[:-2] + ',\n "cases": [\n'
    text += ",\n".join("  " + json.dumps(case) for case in cases) + "\n ]\n}\n"
    json.loads(text)
    (HERE / "expected.json").write_text(text)
    print(json.dumps(summary, indent=1))


def load():
    """All rows in river's order: features as f64 [1250, 9], label as bool [1250]."""
    pairs = list(datasets.Phishing())
    return np.array([[float(x[name]) for name in FEATURES] for x, _ in pairs]), np.array([y for _, y in pairs])


def entity(row):
    return f"site-{row + 1:04}"


def graph(scaler, network):
    """(x - mean) * 1/scale, then Gemm + Relu twice, then Gemm + Sigmoid: operators every runtime has."""
    constants = {"mean": scaler.mean_, "inverse_scale": 1 / scaler.scale_}
    nodes = [
        helper.make_node("Sub", ["features", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "inverse_scale"], ["hidden_0"]),
    ]
    last = len(network.coefs_) - 1
    for i, (weight, bias) in enumerate(zip(network.coefs_, network.intercepts_)):
        constants |= {f"weight_{i}": weight, f"bias_{i}": bias}
        nodes += [
            helper.make_node("Gemm", [f"hidden_{i}", f"weight_{i}", f"bias_{i}"], [f"sum_{i}"]),
            helper.make_node("Sigmoid" if i == last else "Relu", [f"sum_{i}"], ["score" if i == last else f"hidden_{i + 1}"]),
        ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "phishing",
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", len(FEATURES)])],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 1])],
            [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,  # the one that came with opset 17; newer files are refused by older runtimes
        producer_name="spillway cli/dev/model/train.py",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def write_group(name, columns, rows):
    """One feature group as a load: entity, the time of the event, its columns."""
    with open(HERE / f"{name}.csv", "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["entity", "event_time", *columns])
        for i, row in enumerate(rows):
            event = FIRST_EVENT + datetime.timedelta(seconds=i + 1)
            values = [row[FEATURES.index(column)] for column in columns]
            out.writerow([entity(i), event.isoformat() + "Z", *map(float, values)])


if __name__ == "__main__":
    main()

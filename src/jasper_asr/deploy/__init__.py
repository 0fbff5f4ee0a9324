"""From ONNX to the formats of other chips. `ascend.py` drives atc; `buckets.py` chooses lengths to compile for."""

"""Classify 96×96 patches as tumour or not, across hospitals: ``python -m examples.histopathology``.

Read ``minimal.py`` first. The rest is in folders, each of which uses only those before it: ``data`` reads patches,
``making`` makes data sets, ``methods`` defines methods, ``augment`` augments batches, ``training`` trains one model,
``runs`` trains, checks and compares methods, ``predicting`` has whole slides and ONNX, ``report`` writes the report.
"""

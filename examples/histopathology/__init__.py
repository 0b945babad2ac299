"""Tumour or not, on 96×96 patches from hospitals never seen in training: ``python -m examples.histopathology``.

Read ``minimal.py`` first. The rest is in folders, each of which uses only those before it: ``data`` reads patches,
``making`` makes data sets, ``methods`` says what a method is, ``augment`` changes batches, ``training`` trains one
model, ``runs`` trains, proves and compares methods, ``predicting`` has whole slides and ONNX, ``report`` shows it all.
"""

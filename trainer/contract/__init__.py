"""What the control plane and the data plane agree on: stdlib and pydantic, imports in milliseconds.

Knows nothing of torch, Ray, boto3 or gRPC. Everything here is a value or a pure function of values.
"""

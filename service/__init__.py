"""Control plane: decides what should run. asyncio; no torch, no boto3."""

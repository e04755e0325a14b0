"""Data plane: the attempts of one job. Synchronous; no SQL; never imports service/."""

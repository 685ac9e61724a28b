"""Runs on several machines: bundles, certificates, checks and submission."""

"""Several machines: bundles, certificates, checks, submission."""

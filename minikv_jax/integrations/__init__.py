"""Adapters to other projects. `lm_eval` needs the package that it is named after, an extra of this one."""

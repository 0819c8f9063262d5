"""The path of a request: validate, plan, fan out, merge, finish."""

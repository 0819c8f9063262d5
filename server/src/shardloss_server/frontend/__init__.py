"""The way of a request: validate, plan, fan out, merge, finish."""

"""What could keep a daemon from working, on this machine and with this configuration.

`facts` says what is looked at; `gather`, `gather_index` and `asking` look and change nothing. Pure: `machine`,
`directory`, `index`, `running`, which make findings of the facts.
"""

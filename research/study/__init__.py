"""How results are kept and shown: run folders, sweeps and studies, tables, figures, reports.

* `configs` frozen dataclasses to canonical JSON and back
* `environment` versions, machine, state of the code
* `records` the metrics file of a run
* `runs` run folders and their identities
* `sweeps` lists of overrides and their combinators
* `study` the cells of a sweep run one by one, resumed where they stopped
* `tables` mean ± standard deviation over seeds, as Markdown and CSV
* `figures` SVG figures
* `report` one self-contained HTML page
* `collect` the same page made from any folder of runs
"""

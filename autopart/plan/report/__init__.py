"""A plan as one HTML page: figures, tables, and the numbers behind them as JSON.

The page needs no network and no script. Figures are SVG, which `drawing.py` has as data; `page.html` writes everything
out and escapes it, for a plan may come from a stranger. Open `page.py` first.
"""

from autopart.plan.report.extras import Bench as Bench
from autopart.plan.report.extras import BenchRow as BenchRow
from autopart.plan.report.extras import Extras as Extras
from autopart.plan.report.page import report_html as report_html
from autopart.plan.report.page import write_report as write_report

"""Reports of rows that evaluations left: statistics over seeds, text, tables, figures. It loads no engine."""

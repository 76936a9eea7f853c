"""The paper's evaluation: what it says, the runs that repeat it, and the page that sets both side by side."""

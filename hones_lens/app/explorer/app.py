# /// script
# [tool.marimo.display]
# theme = "system"
# ///
"""The page of `hones explore`: an app of marimo whose one cell is the explorer."""

import marimo

app = marimo.App(width="full", app_title="Explorer")


@app.cell
def _():
    from hones_lens.app.explorer.serve import explorer_of_new_tab

    explorer_of_new_tab()
    return


if __name__ == "__main__":
    app.run()

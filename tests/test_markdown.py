from wn21k_zoo.markdown import markdown_table


def test_what_holds_a_bar_stays_in_its_cell():
    table = markdown_table(("name", "size"), [("either|or", 1), ("none", None)])
    assert table.splitlines() == ["| name | size |", "|---|---|", "| either\\|or | 1 |", "| none | unknown |"]

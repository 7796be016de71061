"""What is sent of the browser's client. That the client still works in this form is shown in tests/static."""

from pubsub_mw.realtime.script import slim

TEXT = """\
/**
 * Say what this is.
 */

/** @param {number} a */
export function add(a) {
  // why
  const url = "http://example.org/ /* not a comment */"; // why here
  return url + `//${a}` + a; // https://example.org

}
"""


def test_comments_and_indentation_are_left_out_and_nothing_else() -> None:
    first, rest = slim(TEXT).split("\n", 1)
    assert first.startswith("// pubsub-mw")
    assert rest == (
        "export function add(a) {\n"
        'const url = "http://example.org/ /* not a comment */";\n'
        "return url + `//${a}` + a;\n"
        "}\n"
    )

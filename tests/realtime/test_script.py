"""What is sent of the browser's client. That the client still works in this form is shown in tests/static."""

from pubsub_mw.realtime.script import slim

TEXT = """\
/**
 * Say what this is.
 */

/** @param {number} a */
export function add(a) {
  // why
  const sum = /** @type {number} */ (a) + +a; // inside a line
  const url = "http://example.org/ /* not a comment */"; // why here
  if (sum !== !url) return url + `//${ a } , ${a}` + a; // https://example.org

  return { url, sum: "a \\" , b" };
}
"""


def test_comments_and_spaces_are_left_out_and_nothing_else() -> None:
    assert slim(TEXT) == (
        "export function add(a){\n"
        "const sum=(a)+ +a;\n"
        'const url="http://example.org/ /* not a comment */";\n'
        "if(sum!==!url)return url + `//${ a } , ${a}` + a;\n"
        'return{url,sum:"a \\" , b"};\n'
        "}\n"
    )

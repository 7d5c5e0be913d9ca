"Links for every mention of a symbol, module, notebook or paper, and equations as MathML."

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

PAPER = re.compile(r"arXiv[: ]\s?(\d{4}\.\d{5})")


def inside(node: nodes.Node, *kinds: type) -> bool:
    "Whether a node lies in one of some kinds."
    while node is not None and not isinstance(node, kinds):
        node = node.parent
    return node is not None


def link(page: str, target: tuple[str, str, str], text: nodes.Node) -> pending_xref:
    "A reference that Sphinx resolves when all pages are read, or warns of."
    domain, role, name = target
    options = {"refdomain": domain, "reftype": role, "reftarget": name, "refexplicit": True, "refwarn": True, "refdoc": page}
    return pending_xref("", text, **options)


class MentionLinks(SphinxTransform):
    "Make every literal that names a symbol, a module or a notebook a link to it."

    default_priority = 600

    def apply(self):
        page = self.env.docname
        for node in [*self.document.findall(nodes.literal)]:
            target = self.config.spikeprompt_targets.get(node.astext().removesuffix("()"))
            if target and target[2] != f"/{page}" and not inside(node, nodes.reference, nodes.title, pending_xref):
                node.replace_self(link(page, target, node.deepcopy()))


class PaperLinks(SphinxTransform):
    "Make every `arXiv 2203.12119` a link to its entry in the bibliography."

    default_priority = 601

    def apply(self):
        page = self.env.docname
        for text in [*self.document.findall(nodes.Text)]:
            pieces = PAPER.split(text)  # text, number, text, number, ..., text
            if len(pieces) == 1 or page == "bibliography":
                continue
            if inside(text, nodes.reference, nodes.literal, nodes.literal_block, nodes.title, pending_xref):
                continue
            found = [nodes.Text(pieces[0])]
            for number, after in zip(pieces[1::2], pieces[2::2]):
                label = f"arxiv-{number.replace('.', '-')}"
                found += [link(page, ("std", "ref", label), nodes.inline("", f"arXiv {number}")), nodes.Text(after)]
            text.parent.replace(text, found)


def visit_inline(self, node):
    "MathML, which browsers read without a script."
    self.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def visit_block(self, node):
    "MathML in a box that scrolls."
    self.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


ACCESSIBLE = {  # what axe-core finds in the pages of Sphinx, Furo and MyST-NB: as they write it -> as it should be
    "<pre>": '<pre tabindex="0">',  # what scrolls has to be reached by the keyboard
    '<div class="equation">': '<div class="equation" tabindex="0">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
    ' aria-label="Toggle hidden content"': "",  # the visible text says more
    'class="caption" role="heading"': 'class="caption" role="heading" aria-level="2"',
}


def make_accessible(app, pagename, templatename, context, doctree):
    "Mend the HTML of a page before it is written."
    for part in {"body", "furo_navigation_tree"} & set(context):
        for found, mended in ACCESSIBLE.items():
            context[part] = context[part].replace(found, mended)


def setup(app):
    app.add_config_value("spikeprompt_targets", {}, "env")
    app.add_transform(MentionLinks)
    app.add_transform(PaperLinks)
    app.connect("html-page-context", make_accessible, priority=900)  # after the theme
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

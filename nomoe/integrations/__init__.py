"""nomoe inside other libraries; each module needs the library it is named after.

The core never imports these. What most people need of them is on `nomoe` itself.
"""

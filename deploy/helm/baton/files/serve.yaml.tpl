{{- /* The Serve application that KubeRay hands to Ray: `args` is the cluster.yaml of `baton deploy`. */ -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ include "baton.servePort" . }}
applications:
  - name: baton
    route_prefix: /
    import_path: baton.cluster.application:build
    args:
      model:
        path: {{ .Values.model.path | quote }}
        served_name: {{ .Values.model.servedName | quote }}
      registry:
        url: {{ include "baton.registryUrl" . | quote }}
        prefix: {{ include "baton.registryPrefix" . | quote }}
      security:
        ticket_key_file: {{ if .Values.security.insecure }}""{{ else }}{{ include "baton.ticketKeyFile" . | quote }}{{ end }}
        insecure: {{ .Values.security.insecure }}
        {{- $tls := ternary "/etc/baton/tls/" "" (ne .Values.security.tls.router "") }}
        tls_cert: {{ ternary (print $tls "tls.crt") "" (ne $tls "") | quote }}
        tls_key: {{ ternary (print $tls "tls.key") "" (ne $tls "") | quote }}
        tls_ca: {{ ternary (print $tls "ca.crt") "" (ne $tls "") | quote }}
      router:
        min: {{ .Values.router.min }}
        max: {{ .Values.router.max }}
        http_host: 0.0.0.0
        http_port: {{ include "baton.httpPort" . }}
        num_cpus: 1
        resources: {baton_router: 1}
        label_selector: {{ toJson .Values.router.labelSelector }}
        drain_s: {{ .Values.router.drainSeconds }}
        surge_percent: {{ .Values.router.surgePercent }}
        flags: {{ toJson .Values.router.flags }}
      prefill:
        min: {{ .Values.prefill.min }}
        max: {{ .Values.prefill.max }}
        num_cpus: 1
        num_gpus: {{ .Values.prefill.gpus }}
        resources: {baton_prefill: 1}
        label_selector: {{ toJson .Values.prefill.labelSelector }}
        drain_s: {{ .Values.prefill.drainSeconds }}
        surge_percent: {{ .Values.prefill.surgePercent }}
        target: {first_token_s: {{ .Values.prefill.target.firstTokenSeconds }}}
        flags: {{ include "baton.workerFlags" (dict "root" . "flags" .Values.prefill.flags) }}
      decode:
        min: {{ .Values.decode.min }}
        max: {{ .Values.decode.max }}
        num_cpus: 1
        num_gpus: {{ .Values.decode.gpus }}
        resources: {baton_decode: 1}
        label_selector: {{ toJson .Values.decode.labelSelector }}
        drain_s: {{ .Values.decode.drainSeconds }}
        surge_percent: {{ .Values.decode.surgePercent }}
        target: {token_gap_s: {{ .Values.decode.target.tokenGapSeconds }}}
        flags: {{ include "baton.workerFlags" (dict "root" . "flags" .Values.decode.flags) }}

{{/* The pod templates of the Ray groups. */}}

{{- define "baton.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .root.Values.security.readOnlyRootFilesystem }}
runAsNonRoot: true
runAsUser: {{ .root.Values.security.runAsUser }}
capabilities:
  drop: [ALL]
  {{- if .rdma }}
  add: [IPC_LOCK] # RDMA pins the pool's pages
  {{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* The container's resources, with devices. `rdma` and `gpus` are of this tier. */}}
{{- define "baton.resources" -}}
{{- $devices := dict -}}
{{- if .gpus -}}{{- $_ := set $devices .root.Values.gpu.resourceName (toString .gpus) -}}{{- end -}}
{{- if .rdma -}}{{- $_ := set $devices .root.Values.rdma.resourceName (toString .root.Values.rdma.count) -}}{{- end -}}
{{- $limits := merge (dict) $devices .tier.resources.limits -}}
{{- $requests := merge (dict) $devices (.tier.resources.requests | default dict) -}}
{{- dict "limits" $limits "requests" $requests | toYaml -}}
{{- end -}}

{{- define "baton.env" -}}
{{- $v := .root.Values -}}
- {name: HOME, value: /tmp}
{{- if include "baton.redisPassword" .root }}
- name: BATON_REGISTRY_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "baton.redisSecret" .root }}, key: {{ $v.redis.passwordKey }}}}
{{- end }}
- {name: RAY_AUTH_MODE, value: {{ $v.ray.auth.mode }}}
{{- if eq $v.ray.auth.mode "token" }}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "baton.raySecret" .root }}, key: auth_token}}
{{- end }}
{{- if eq .name "head" }}
{{- with $v.redis.external.caSecret }}
- {name: RAY_REDIS_CA_CERT, value: /etc/baton/redis-ca/ca.crt}
{{- end }}
{{- with $v.monitoring.prometheusHost }}
- {name: RAY_PROMETHEUS_HOST, value: {{ . | quote }}}
{{- end }}
{{- with $v.monitoring.grafanaHost }}
- {name: RAY_GRAFANA_HOST, value: {{ . | quote }}}
# The second tab of the metrics page, whatever Ray calls it, is Baton's dashboard.
- {name: RAY_GRAFANA_DATA_DASHBOARD_UID, value: {{ ($.root.Files.Get "files/dashboards/baton.json" | fromJson).uid | quote }}}
{{- end }}
{{- with $v.monitoring.grafanaIframeHost }}
- {name: RAY_GRAFANA_IFRAME_HOST, value: {{ . | quote }}}
{{- end }}
{{- else }}
# The pod outlives the drain of its Ray node, and that outlives the start of a successor and the drain of its replica.
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ add .tier.successorSeconds .tier.drainSeconds 30 | quote }}}
- {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: {{ $v.ray.gcsFaultTolerance.reconnectTimeoutSeconds | quote }}}
- {name: HF_HOME, value: /models/hub}
{{- if $v.modelCache.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- with $v.hfToken.existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $v.hfToken.key }}}}
{{- end }}
{{- end }}
{{- with .tier.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.volumes" -}}
{{- $v := .root.Values -}}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .tier.shmSize }}}
{{- if not $v.security.insecure }}
- name: keys
  secret:
    secretName: {{ $v.security.existingSecret }}
    defaultMode: 0440
    items: [{key: {{ $v.security.ticketKey }}, path: {{ $v.security.ticketKey }}}]
{{- end }}
{{- if and (eq $v.redis.mode "external") $v.redis.external.caSecret }}
- name: redis-ca
  secret: {secretName: {{ $v.redis.external.caSecret }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- if ne .name "head" }}
- name: models
  {{- with $v.modelCache }}
  {{- if eq .type "existingClaim" }}
  persistentVolumeClaim: {claimName: {{ .existingClaim }}, readOnly: {{ .readOnly }}}
  {{- else if eq .type "pvc" }}
  persistentVolumeClaim: {claimName: {{ include "baton.fullname" $.root }}-models}
  {{- else if eq .type "hostPath" }}
  hostPath: {path: {{ .hostPath }}, type: Directory}
  {{- else if eq .type "image" }}
  image: {reference: {{ .image.reference }}, pullPolicy: {{ .image.pullPolicy }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .size }}}
  {{- end }}
  {{- end }}
{{- if get $v.security.tls .name }}
- name: tls
  secret: {secretName: {{ get $v.security.tls .name }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- with .tier.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.volumeMounts" -}}
{{- $v := .root.Values -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- if not $v.security.insecure }}
- {name: keys, mountPath: /etc/baton/keys, readOnly: true}
{{- end }}
{{- if and (eq $v.redis.mode "external") $v.redis.external.caSecret }}
- {name: redis-ca, mountPath: /etc/baton/redis-ca, readOnly: true}
{{- end }}
{{- if ne .name "head" }}
- {name: models, mountPath: /models, readOnly: {{ or (eq $v.modelCache.type "image") (and (has $v.modelCache.type (list "existingClaim" "hostPath")) $v.modelCache.readOnly) }}}
{{- if get $v.security.tls .name }}
- {name: tls, mountPath: /etc/baton/tls, readOnly: true}
{{- end }}
{{- end }}
{{- with .tier.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.ports" -}}
{{- if eq .name "router" -}}
- {name: http, containerPort: {{ include "baton.httpPort" .root }}}
{{ end -}}
- {name: serve, containerPort: {{ include "baton.servePort" .root }}}
- {name: metrics, containerPort: 8080}
{{- if eq .name "head" }}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: client, containerPort: 10001}
{{- end }}
{{- end -}}

{{/* dict root, name, tier; a head has neither drain nor devices. */}}
{{- define "baton.podTemplate" -}}
{{- $v := .root.Values -}}
{{- $worker := has .name (list "prefill" "decode") -}}
{{- $rdma := and $worker $v.rdma.enabled -}}
{{- $gpus := int (.tier.gpus | default 0) -}}
{{- $token := or (eq .name "head") (and $worker $v.nodeLabels.enabled) -}}
metadata:
  labels:
    {{- include "baton.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
    {{- with .tier.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .tier.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "baton.serviceAccount" .root }}
  automountServiceAccountToken: {{ $token }}
  terminationGracePeriodSeconds: {{ if kindIs "invalid" .tier.terminationGracePeriodSeconds }}{{ add .tier.successorSeconds .tier.drainSeconds 60 }}{{ else }}{{ .tier.terminationGracePeriodSeconds }}{{ end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ $v.security.runAsUser }}
    runAsGroup: {{ $v.security.runAsUser }}
    fsGroup: {{ $v.security.fsGroup }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .name }}
      image: {{ include "baton.image" .root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      ports:
        {{- include "baton.ports" . | nindent 8 }}
      env:
        {{- include "baton.env" . | nindent 8 }}
        {{- if and $worker $v.nodeLabels.enabled }}
        - {name: BATON_NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: BATON_RACK_LABEL, value: {{ $v.nodeLabels.rackLabel | quote }}}
        {{- end }}
      {{- if eq .name "router" }}
      {{- /* KubeRay adds what is missing: liveness by the raylet, and readiness of workers by the raylet and Serve's proxy. */}}
      readinessProbe:
        httpGet: {path: /health, port: http}
        {{- toYaml .tier.readinessProbe | nindent 8 }}
      {{- end }}
      resources:
        {{- include "baton.resources" (dict "root" .root "tier" .tier "gpus" $gpus "rdma" $rdma) | nindent 8 }}
      securityContext:
        {{- include "baton.securityContext" (dict "root" .root "rdma" $rdma) | nindent 8 }}
      volumeMounts:
        {{- include "baton.volumeMounts" . | nindent 8 }}
  volumes:
    {{- include "baton.volumes" . | nindent 4 }}
  {{- with .tier.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tier.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tier.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tier.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tier.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .tier.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
{{- end -}}
